"""`python -m cskv`: the command line, as `accelerate launch -m cskv` starts it."""

from cskv.cli import app

if __name__ == "__main__":
    app()
