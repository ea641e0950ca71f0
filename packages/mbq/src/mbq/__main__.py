"""`python -m mbq`: the command line, as `accelerate launch -m mbq` starts it."""

from mbq.cli import app

if __name__ == "__main__":
    app()
