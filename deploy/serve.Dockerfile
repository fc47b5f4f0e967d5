# The server. From the root of the repository:
#
#   docker build -f deploy/serve.Dockerfile -t internlm-serve .
#   export INTERNLM_API_KEY=$(openssl rand -hex 32)
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/out:/model:ro" -e INTERNLM_API_KEY internlm-serve
#
# In the container it listens for others, who need the key: without one it would answer any page that a browser shows.
# Training has train.Dockerfile.
FROM python:3.12-slim

# PyPI's wheel of torch for Linux brings CUDA: gigabytes that a server on a CPU never opens. This index has the same
# version without it, called …+cpu: that meets the pin of constraints.txt, and pip takes it before the plain one.
# For a GPU: `docker build --build-arg TORCH_INDEX=https://pypi.org/simple …`, and `docker run --gpus all …`.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The user below has no home for the kernels that Triton builds on a GPU.
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 TRITON_CACHE_DIR=/tmp/triton

WORKDIR /opt/internlm
COPY constraints.txt ./
# Before the sources, so that a change of ours does not fetch torch again.
RUN pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple -c constraints.txt torch numpy
# Triton comes with the torch for GPUs, and builds the launcher of each kernel with a C compiler.
RUN if pip show --quiet triton; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY internlm internlm
RUN pip install -c constraints.txt ".[serve]"

# A user without rights, whose number a mounted folder can be made readable for.
RUN useradd --system --no-create-home --uid 10001 --shell /usr/sbin/nologin internlm
USER 10001:10001
WORKDIR /tmp

EXPOSE 8000
# Weights are read before the port answers: a 7B model takes a minute or two from a disk.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m --retries=3 \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# SIGTERM lets answers under way end (--drain-seconds): stop with more than that, `docker stop --time 45`.
STOPSIGNAL SIGTERM
ENTRYPOINT ["internlm", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000", "--drain-seconds", "30"]
