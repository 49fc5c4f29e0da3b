"""Who competes in the rows: a module for each kind of row, and for rivals that need more."""
