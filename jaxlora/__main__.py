"""The command line as a module: ``python -m jaxlora``."""

from jaxlora.cli import main

if __name__ == "__main__":
    main()
