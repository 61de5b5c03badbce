"""The demo model and its texts, made by `scripts/train_demo.py` and `scripts/package_demo.py`."""
