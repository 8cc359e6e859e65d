// Writes a file with every form of page, for the reader to be held against.
package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	bolt "LIBRARY"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	size, err := strconv.Atoi(os.Args[2])
	check(err)
	options := &bolt.Options{PageSize: size, NoFreelistSync: os.Args[3] == "nosync"}
	db, err := bolt.Open(os.Args[1], 0o600, options)
	check(err)
	check(db.Update(func(tx *bolt.Tx) error {
		many, err := tx.CreateBucket([]byte("many"))
		check(err)
		for n := 0; n < 20000; n++ {
			check(many.Put([]byte(fmt.Sprintf("key %d", n)), bytes.Repeat([]byte{byte(n)}, n%300)))
		}
		nested, err := tx.CreateBucket([]byte("nested"))
		check(err)
		check(nested.Put([]byte("long"), bytes.Repeat([]byte{9}, 1<<20)))
		for n := 0; n < 100; n++ {
			inner, err := nested.CreateBucket([]byte(fmt.Sprintf("b%03d", n)))
			check(err)
			check(inner.Put([]byte("v"), []byte(strconv.Itoa(n))))
		}
		return nil
	}))
	check(db.Update(func(tx *bolt.Tx) error {
		for n := 0; n < 20000; n += 3 {
			check(tx.Bucket([]byte("many")).Delete([]byte(fmt.Sprintf("key %d", n))))
		}
		return nil
	}))
	check(db.Close())
}
