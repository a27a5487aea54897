"""ServerApp and ClientApp for `flwr run`; server and sites need fedekd installed."""

from fedekd.flower.apps import make_client_app, make_server_app

server_app = make_server_app()
client_app = make_client_app()
