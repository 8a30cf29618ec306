# A GPU node. Build from the repository's root:
#     docker build -f deploy/images/node.Dockerfile -t bouquet-node:0.1.0 .
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/bouquet
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY bouquet bouquet
COPY common common
COPY strategies strategies
COPY client_app client_app
COPY server_app server_app
COPY deploy deploy
COPY profiles profiles
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --editable .
ENV PATH=/opt/bouquet/.venv/bin:$PATH
# The code of this image, and no other, may run in it.
RUN bouquet bundle > bundles.txt
ENV BOUQUET_BUNDLES=/opt/bouquet/bundles.txt
RUN useradd --create-home --uid 10001 bouquet
USER bouquet
