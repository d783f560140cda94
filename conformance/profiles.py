"""How many examples each operation, format and implementation gets."""

PROFILES = {"smoke": 10, "ci": 200, "deep": 2000, "soak": 50000}
