"""Who a base is, by content, and which base a decode module was trained on (contract 4)."""
