# ONNX Runtime and OpenVINO on the CPU.
#   docker build -f docker/cpu.Dockerfile -t qyolo:validate .                  validate, verify, selftest, doctor, bench
#   docker build -f docker/cpu.Dockerfile --target build -t qyolo:build .      also build and matrix (torch)
# The tag may be held to one image: --build-arg PYTHON=python:3.11-slim-bookworm@sha256:...
ARG PYTHON=python:3.11-slim-bookworm

# OpenCV's wheel links against GL, GLib and X11, though nothing here opens a window. Debian's libgl1 brings Mesa and LLVM
# along, which are larger than all the rest; the bare libraries are enough. Scanners find the packages in status.d.
FROM ${PYTHON} AS libraries
WORKDIR /packages
RUN apt-get update \
 && apt-get download libgl1 libglvnd0 libglx0 libglib2.0-0 libpcre2-8-0 libx11-6 libxcb1 libxau6 libxdmcp6 libbsd0 \
      libmd0 \
 && mkdir -p /libraries/lib /libraries/status.d \
 && for package in *.deb; do \
      dpkg-deb --field "$package" > "/libraries/status.d/${package%%_*}" && dpkg-deb --extract "$package" . || exit 1; \
    done \
 && find . -name 'lib*.so.*' -exec cp -P {} /libraries/lib ';'

FROM ${PYTHON} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY qyolo_deploy qyolo_deploy
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# What both images share; they differ in the environment that is copied in.
FROM ${PYTHON} AS runtime
LABEL org.opencontainers.image.title="qyolo_deploy" \
      org.opencontainers.image.description="From float YOLO weights to low-bit engines, with the accuracy proven" \
      org.opencontainers.image.licenses="AGPL-3.0-or-later" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"
COPY --from=libraries /libraries/lib/ /usr/local/lib/
COPY --from=libraries /libraries/status.d/ /var/lib/dpkg/status.d/
RUN ldconfig && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin qyolo
# All that is ever written beside the named outputs goes to /tmp, so that the root file system can be read-only.
ENV PATH=/opt/qyolo/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    YOLO_CONFIG_DIR=/tmp/ultralytics \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv
# As the first process of a container, Python hears SIGTERM only if it asks to; qyolo asks for SIGINT.
STOPSIGNAL SIGINT
ENTRYPOINT ["qyolo"]
CMD ["--help"]

FROM wheel AS build-environment
ARG TORCH="torch>=2.12,<2.14"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv --without-pip /opt/qyolo \
 && python -m pip --python /opt/qyolo/bin/python install --no-cache-dir --index-url "$TORCH_INDEX" \
      "$TORCH" torchvision \
 && python -m pip --python /opt/qyolo/bin/python install --no-cache-dir "$(echo /wheel/*.whl)[build]" \
 && python -m pip --python /opt/qyolo/bin/python uninstall --yes openvino-telemetry

FROM runtime AS build
# torch compiles a few small kernels where it finds a compiler, into TORCHINDUCTOR_CACHE_DIR. Debian keeps one version of
# it per release, so pinning would break the build at the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
COPY recipes /opt/qyolo/recipes
COPY calibration /opt/qyolo/calibration
COPY --from=build-environment /opt/qyolo /opt/qyolo
USER 10001:10001

FROM wheel AS validate-environment
# "openvino", or nothing for ONNX Runtime alone.
ARG EXTRAS=openvino
# OpenVINO's plugins for other processors than the CPU are a third of it, and find none in here. Its telemetry would
# leave an id under HOME; it works without.
RUN python -m venv --without-pip /opt/qyolo \
 && python -m pip --python /opt/qyolo/bin/python install --no-cache-dir "$(echo /wheel/*.whl)${EXTRAS:+[$EXTRAS]}" \
 && python -m pip --python /opt/qyolo/bin/python uninstall --yes openvino-telemetry \
 && rm -f /opt/qyolo/lib/python3*/site-packages/openvino/libs/libopenvino_intel_[gn]pu_plugin.so \
      /opt/qyolo/lib/python3*/site-packages/openvino/libs/cache.json

FROM runtime AS validate
COPY --from=validate-environment /opt/qyolo /opt/qyolo
USER 10001:10001
