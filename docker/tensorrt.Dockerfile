# TensorRT engines on an NVIDIA GPU, beside those of ONNX Runtime on the CPU.
#   docker build -f docker/tensorrt.Dockerfile -t qyolo:tensorrt .
#   docker run --rm --gpus all --network none --read-only --tmpfs /tmp ... qyolo:tensorrt doctor
# An engine loads on the TensorRT that built it: take the image with the version of the device's, such as 25.11 for 10.14
# (--build-arg TENSORRT=nvcr.io/nvidia/tensorrt:25.11-py3). 26.05 has TensorRT 10.16 and CUDA 13.
ARG TENSORRT=nvcr.io/nvidia/tensorrt:26.05-py3

FROM ${TENSORRT} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY qyolo_deploy qyolo_deploy
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${TENSORRT} AS tensorrt
ARG TENSORRT
LABEL org.opencontainers.image.title="qyolo_deploy" \
      org.opencontainers.image.description="Low-bit YOLO engines of TensorRT, validated on the GPU" \
      org.opencontainers.image.licenses="AGPL-3.0-or-later" \
      org.opencontainers.image.base.name="${TENSORRT}"
# OpenCV's wheel links against GL and GLib. Ubuntu keeps one version of them per release, so pinning would break the build
# at the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0t64 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin qyolo
# Python's packages of CUDA must be of the base's major version. The base's tensorrt is seen through the system's
# packages; pip has nothing to do with it, and a base without it is refused here, where no GPU is needed.
ARG CUDA_PYTHON="cuda-bindings>=13,<14"
COPY --from=wheel /wheel /wheel
RUN python3 -m venv --without-pip --system-site-packages /opt/qyolo \
 && python3 -m pip --python /opt/qyolo/bin/python install --no-cache-dir /wheel/*.whl "$CUDA_PYTHON" \
 && rm -r /wheel \
 && /opt/qyolo/bin/python -c "import importlib.metadata as m; print('TensorRT', m.version('tensorrt'))" \
 && /opt/qyolo/bin/python -c "import cv2"
# All that is ever written beside the named outputs goes to /tmp, so that the root file system can be read-only.
ENV PATH=/opt/qyolo/bin:${PATH} \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    CUDA_CACHE_PATH=/tmp/cuda \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv
STOPSIGNAL SIGINT
USER 10001:10001
# The base's own entry point prints a banner to stdout, where `--json` puts its object.
ENTRYPOINT ["qyolo"]
CMD ["--help"]
