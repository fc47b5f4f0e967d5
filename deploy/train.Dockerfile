# Training on GPUs. From the root of the repository:
#
#   docker build -f deploy/train.Dockerfile -t internlm .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/shared" -w /shared internlm internlm launch train RECIPE
#
# The wheel of torch brings CUDA and NCCL; the machine brings the driver, and NVIDIA's container toolkit `--gpus`.
# --ipc=host: NCCL's ranks meet in shared memory, of which Docker gives 64 MiB. The server has serve.Dockerfile.
FROM python:3.12-slim

# Triton builds the launcher of each kernel with gcc, torch.compile kernels for CPUs with g++; Python's headers are in
# this image already. gloo and NCCL need nothing from the system.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/internlm
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY internlm internlm
RUN pip install --no-cache-dir -c constraints.txt ".[plot,hf,track,data]"
COPY recipes recipes

CMD ["internlm", "doctor"]
