"""Which parameters learn. Importing this package makes PEFT know our tuners (see `registration.py`)."""

from luthier.tuning.registration import register_all

register_all()
