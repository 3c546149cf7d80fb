# docker build -f docker/cpu.Dockerfile -t eqx_q . && docker run --rm -v "$PWD/runs:/eqx_q/runs" eqx_q env=minatar
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /eqx_q
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e ".[all]"
ENTRYPOINT ["python", "scripts/train.py"]
