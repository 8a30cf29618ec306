"""The ServerApp. The libraries that do the work are imported when a run starts, beside the start of the nodes."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.error import BouquetError

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run of the federation; a mistake of the user's is told in one message, before Flower's traceback."""
    from server_app.run import conduct

    try:
        conduct(grid, context)
    except BouquetError as error:
        # In one line, by which whoever started the run finds it in Flower's log.
        print(f"bouquet: {' '.join(str(error).split())}", flush=True)
        raise
