chmod 751 x
chmod 600 d/y
mkdir -m 700 d/private
