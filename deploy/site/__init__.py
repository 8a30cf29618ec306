"""A federation's certificates, keys and kits: what `bouquet site` makes and keeps."""
