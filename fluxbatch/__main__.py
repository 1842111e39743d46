"""``python -m fluxbatch``: the same as ``python -m fluxbatch.run``."""

from fluxbatch.run import main

if __name__ == "__main__":
    main()
