# The image of rayjob.yaml: Ray's own, with rayexp and the versions that were tested together.
# On an image that has a torch already, which then stays as it is:
#   docker build --build-arg BASE=IMAGE --build-arg TORCH=system .
ARG BASE=rayproject/ray:2.60.0-py311-gpu
FROM ${BASE}
ARG TORCH=pinned
COPY --chown=ray . /rayexp
RUN cd /rayexp \
    && if [ "$TORCH" = system ]; then python constraints.py; else cat constraints.txt; fi > /tmp/constraints.txt \
    && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt /rayexp
