"""Who is paid and why: ledger, audit, scoring."""
