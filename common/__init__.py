"""What both sides of a federation must agree on."""

import logging
import warnings

# Notices of libraries about each other, once a process, that no user of Bouquet can act on.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
