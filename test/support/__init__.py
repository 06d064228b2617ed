"""What several test suites share: tiny real models, and the oracle that says what they must answer."""
