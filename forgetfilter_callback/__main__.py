"""Run the command line with `python -m forgetfilter_callback`."""

from .cli.main import main


main()
