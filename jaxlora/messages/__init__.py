"""What users read: errors about their arguments, warnings, tables of text."""
