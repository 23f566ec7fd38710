"""Reads what a run has written and draws it: charts, the HTML report, the text of the doctor."""
