"""The HTTP endpoint: OpenAI's API in front of the engines. Nothing in here knows of Ray; `pipeline.serve` does.

app         the routes                           guard      before them: keys, hosts, sizes, places
api         requests and responses, checked      explain    why a body was refused
chat        a request on its way to its answer   errors     OpenAI's error object
completions answers, whole or streamed           text       tokens → characters, stop strings, log-probabilities
images      data: URLs → tiles                   fetch_url  images from allow-listed hosts
options     what the operator sets               budget     what requests may hold together
client      what the gateway asks of engines     keys       API keys
server      uvicorn, bounded                     metrics    Prometheus
"""
