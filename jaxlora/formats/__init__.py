"""What other libraries call things: their names and layouts, read and written here alone."""
