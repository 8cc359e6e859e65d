#!/bin/sh
# Serves the page of the working directory until it is stopped.
exec httpd -f -p "${PORT}" -h .
