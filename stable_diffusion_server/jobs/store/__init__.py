"""What must outlive the process: accepted jobs, answers to be repeated, and messages to be sent. Knows no HTTP."""
