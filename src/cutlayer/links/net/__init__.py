"""Between organisations: gRPC streams with mutual TLS, and requests over sessions that may break.

``messages``   what crosses a stream, and how it is checked
``session``    one stream between a client and a server: frames, credits, heartbeats
``listener``   the server's end: who may come in
``connecting`` the client's end: who it talks to
``tls``        certificates, fingerprints, and why a handshake failed, in words
``grpc_pipe``  gRPC streams as pipes, and the options of channels and servers
``remote``     the server asks a client, which may be away for a while
``answering``  a client answers, once for each request, however often it is asked

All of it runs on ONE asyncio loop of a process, and nothing else should keep that loop busy: a loop that computes
answers no heartbeats. Whoever runs elsewhere (a driver on a loop of its own) goes through ``remote.on_loop``.
"""

import os

# gRPC writes a line on stderr for each handshake that fails; what a user needs of it is said in our errors and log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
