"""What users are told: errors about their arguments, warnings, tables of text."""
