"""Settings: each is written once, in `settings.py`; `loading.py` resolves flag, file and default."""
