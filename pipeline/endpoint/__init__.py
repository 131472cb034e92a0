"""The HTTP endpoint: OpenAI's API in front of the engines. Nothing in here knows of Ray; `pipeline.serve` does.

app         the routes                          guard    before them: keys, sizes, hosts, request ids
api         requests and responses, checked     errors   OpenAI's error object
chat        a request on its way to its answer  text     tokens → text: characters, stop strings, log-probabilities
images      data: URLs → tiles                  fetch_url images from allow-listed hosts
options     what the operator sets              keys     API keys
client      what the gateway asks of engines    metrics  Prometheus        server   uvicorn, bounded
"""
