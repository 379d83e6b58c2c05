"""`python -m qyolo_deploy`, which torchrun can start in several processes."""

from qyolo_deploy.cli import main

if __name__ == "__main__":
    main()
