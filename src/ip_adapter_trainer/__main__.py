"""`python -m ip_adapter_trainer` is `ip-adapter`."""

from ip_adapter_trainer.cli import main

main()
