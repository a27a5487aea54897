"""What `flwr run` sends to a SuperLink and its SuperNodes: the two apps, of an installed fedekd."""

from fedekd.flower.apps import make_client_app, make_server_app

server_app = make_server_app()
client_app = make_client_app()
