"""What tpu_report.py is made of."""
