"""What callers pass, hold and get: parameters, requests, completions, events; and how all of it is checked."""
