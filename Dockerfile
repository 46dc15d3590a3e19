# The image of rayjob.yaml: Ray's own, with rayexp and the versions that were tested together.
FROM rayproject/ray:2.60.0-py311-gpu
COPY --chown=ray . /rayexp
RUN python -m pip install --no-cache-dir --constraint /rayexp/constraints.txt /rayexp
