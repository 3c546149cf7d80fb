# docker build -f docker/cuda.Dockerfile -t eqx_q-cuda .
# docker run --rm --gpus all -v "$PWD/runs:/eqx_q/runs" eqx_q-cuda env=atari
# JAX brings CUDA's libraries as wheels: the image needs the driver of its host alone.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /eqx_q
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e ".[all,cuda]"
ENTRYPOINT ["python", "scripts/train.py"]
