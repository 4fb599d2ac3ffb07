"""The ServerApp: any strategy, beside a server that trains the trunk."""

from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from cutlayer.flower import train

app = ServerApp()


@app.main()
def main(grid, context):
    """Every value is in the run config: ``flwr run . --run-config 'run="..." out="..."'``."""
    said = context.run_config
    train(
        grid,
        said["run"],
        strategy=FedAvg(fraction_evaluate=said["fraction-evaluate"]),
        bind=said["bind"],
        address=said["address"],
        keys=said["keys"] or None,
        out=said["out"],
    )
