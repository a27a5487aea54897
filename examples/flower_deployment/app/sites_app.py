"""ServerApp and ClientApp for `flwr run`; fedekd must be installed at the server and at the sites."""

from fedekd.flower.apps import make_client_app, make_server_app

server_app = make_server_app()
client_app = make_client_app()
