"""The ledger, its MLflow projection, and what is done with them: release, rollback, forget, verify."""
