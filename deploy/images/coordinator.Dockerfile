# The coordinator: no GPU. Build from the repository's root:
#     docker build -f deploy/images/coordinator.Dockerfile -t bouquet-coordinator:0.1.0 .
FROM python:3.11-slim
WORKDIR /opt/bouquet
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY bouquet bouquet
COPY common common
COPY strategies strategies
COPY client_app client_app
COPY server_app server_app
COPY deploy deploy
COPY profiles profiles
RUN python -m venv .venv && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu --editable .
ENV PATH=/opt/bouquet/.venv/bin:$PATH
# The code of this image, and no other, may run in it.
RUN bouquet bundle > bundles.txt
ENV BOUQUET_BUNDLES=/opt/bouquet/bundles.txt
RUN useradd --create-home --uid 10001 bouquet
USER bouquet
