"""The ClientApp of every node; where its data are is in its node config."""

from cutlayer.flower import client_app

app = client_app()
