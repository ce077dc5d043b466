# An image with tessellar installed. `bash tools/docker.sh cpu` (or cuda) builds it.
#
#   PYTHON       3.11, 3.12 or 3.13
#   DEVICE       cpu or cuda: what NVIDIA's container runtime is asked for, nothing or all GPUs
#   TORCH_INDEX  a further index with another build of torch, such as the smaller one for processors alone, whose
#                address torch's own page of installs names. Without one pip's default build is taken: it has its CUDA
#                libraries with it, and runs on processors as well.
ARG PYTHON=3.11
ARG DEVICE=cpu

FROM python:${PYTHON}-slim AS device-cpu
ENV NVIDIA_VISIBLE_DEVICES=void

FROM python:${PYTHON}-slim AS device-cuda
ENV NVIDIA_VISIBLE_DEVICES=all
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM device-${DEVICE}
ARG TORCH_INDEX=
WORKDIR /tessellar
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY tessellar tessellar
COPY tokenizers tokenizers
COPY models models
COPY configs configs
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt .

# Runs, exports and pictures are written where the container is started: mount a folder there.
WORKDIR /work
ENTRYPOINT ["tessellar"]
CMD ["--help"]
