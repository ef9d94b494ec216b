"""Trains an IP-Adapter under the published script's name and flags; `--help` lists them and everything newer."""

from ip_adapter_trainer.cli import script

if __name__ == "__main__":
    script(variant="base")
