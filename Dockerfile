# CPU image. Build: docker build -t bindllm .   Train: docker run -v "$PWD/checkpoints:/bindllm/checkpoints" bindllm
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /bindllm
COPY . .
# The same two commands as on any machine; the tests need nothing that the first does not fetch.
RUN make test
CMD ["make", "train"]
