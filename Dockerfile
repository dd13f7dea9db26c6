# The course as an image: what `make lab` builds, with the model inside, so that a container needs no network.
#   docker build -t lora-lab . && docker run --rm -p 127.0.0.1:8888:8888 lora-lab
# JupyterLab prints the link with its token. Work is kept with: -v "$PWD/notebooks:/home/student/lora-lab/notebooks"
FROM python:3.11-slim-bookworm

RUN apt-get update && apt-get install --yes --no-install-recommends make git && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home student
USER student
WORKDIR /home/student/lora-lab

# What the packages depend on first: a change of a lesson then installs nothing anew
COPY --chown=student pyproject.toml README.md constraints.txt Makefile ./
COPY --chown=student requirements requirements
COPY --chown=student scripts scripts
COPY --chown=student labkit labkit
RUN make setup && make model && rm -rf /home/student/.cache/pip
COPY --chown=student . .

# Inside, all addresses; outside, the 127.0.0.1 of the command above. The token stays
ENV LAB_ADDRESS=0.0.0.0
EXPOSE 8888
CMD ["make", "lab"]
