# cute_ssm without a GPU: its demo and its tests, with a CPU build of PyTorch.
#
#   docker build -t cute-ssm .
#   docker run --rm cute-ssm                  # the demo
#   docker run --rm cute-ssm pytest -n 2      # the tests
#   docker run --rm -it cute-ssm bash
#
# For a GPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg EXTRAS=test,cu13
# and docker run --gpus all; docker run --rm --gpus all cute-ssm pytest -n 2 --gpu.
FROM python:3.12-slim

ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=test

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore OMP_NUM_THREADS=1

# Some tests compile C and compare with the commit: a compiler, git.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc git libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install "torch==$TORCH" --index-url "$TORCH_INDEX"

WORKDIR /cute_ssm
COPY . .
RUN pip install ./tools/ptxsim ./tools/gpumodel ".[$EXTRAS]"

CMD ["python", "-m", "cute_ssm", "demo"]
