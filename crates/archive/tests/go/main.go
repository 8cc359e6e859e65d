// The oracle: what Go's own packages make of an archive or of a recording.
//
//	oracle list FILE...              one JSON line per archive: its entries, or the error
//	oracle split ARCHIVE RECORDING   fails unless the recording describes the archive
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc64"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Files longer than this are not read: a few bytes of sparse map can ask for 2^60.
const maxSize = 16 << 20

type entry struct {
	Name, Link   []byte
	Type         string
	Size         int64
	Mode         int64
	Uid, Gid     int64
	Seconds      int64
	Nanos        int64
	Major, Minor int64
	Xattrs       map[string][]byte
	Sha256       []byte
}

type listing struct {
	Entries []entry
	Error   string
	Large   bool
}

func list(path string) (l listing) {
	file, err := os.Open(path)
	if err != nil {
		panic(err)
	}
	defer file.Close()
	// Behind a plain reader: seeking would hide truncation.
	reader := tar.NewReader(io.MultiReader(file))
	for {
		header, err := reader.Next()
		if err == io.EOF {
			return l
		}
		if err != nil {
			l.Error = err.Error()
			return l
		}
		// Links, directories and devices have no content, whatever size they tell.
		hasContent := !strings.ContainsRune("123456", rune(header.Typeflag))
		if hasContent && header.Size > maxSize {
			l.Large = true
			return l
		}
		hash := sha256.New()
		if _, err := io.Copy(hash, reader); err != nil {
			l.Error = err.Error()
			return l
		}
		if header.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e := entry{
			Name: []byte(header.Name), Link: []byte(header.Linkname), Type: string(rune(header.Typeflag)),
			Size: header.Size, Mode: header.Mode, Uid: int64(header.Uid), Gid: int64(header.Gid),
			Seconds: header.ModTime.Unix(), Nanos: int64(header.ModTime.Nanosecond()),
			Major: header.Devmajor, Minor: header.Devminor,
			Xattrs: map[string][]byte{}, Sha256: hash.Sum(nil),
		}
		for key, value := range header.PAXRecords {
			if strings.HasPrefix(key, "SCHILY.xattr.") {
				// In hexadecimal: a text of JSON holds no other bytes than UTF-8's.
				e.Xattrs[hex.EncodeToString([]byte(key[len("SCHILY.xattr."):]))] = []byte(value)
			}
		}
		l.Entries = append(l.Entries, e)
	}
}

// As Docker's layer store has it.
type record struct {
	Type     int    `json:"type"`
	Name     string `json:"name,omitempty"`
	NameRaw  []byte `json:"name_raw,omitempty"`
	Size     int64  `json:"size,omitempty"`
	Payload  []byte `json:"payload"`
	Position int    `json:"position"`
}

func split(archivePath, recordingPath string) error {
	archive, err := os.ReadFile(archivePath)
	if err != nil {
		return err
	}
	file, err := os.Open(recordingPath)
	if err != nil {
		return err
	}
	unzipped, err := gzip.NewReader(file)
	if err != nil {
		return err
	}
	// The names of the file records, which must be the archive's.
	var names []string
	for reader := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := reader.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if header.Typeflag != tar.TypeXGlobalHeader {
			names = append(names, header.Name)
		}
	}
	seen := map[string]bool{}
	decoder := json.NewDecoder(unzipped)
	for position := 0; ; position++ {
		var r record
		if err := decoder.Decode(&r); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		if r.Position != position {
			return fmt.Errorf("record %d says it is %d", position, r.Position)
		}
		n := r.Size
		if r.Type == 2 {
			n = int64(len(r.Payload))
		}
		if n > int64(len(archive)) {
			return fmt.Errorf("record %d leads past the end", position)
		}
		content := archive[:n]
		archive = archive[n:]
		switch r.Type {
		case 1:
			name := r.Name
			if len(r.NameRaw) > 0 {
				name = string(r.NameRaw)
			}
			if len(names) == 0 || names[0] != name {
				return fmt.Errorf("record %d is of %q, the archive continues with %q", position, name, names)
			}
			names = names[1:]
			clean := filepath.Clean(name)
			if seen[clean] {
				return fmt.Errorf("record %d repeats %q", position, clean)
			}
			seen[clean] = true
			sum := crc64.New(crc64.MakeTable(crc64.ISO))
			sum.Write(content)
			if n > 0 && !bytes.Equal(sum.Sum(nil), r.Payload) {
				return fmt.Errorf("record %d has checksum %x, not %x", position, r.Payload, sum.Sum(nil))
			}
		case 2:
			if !bytes.Equal(content, r.Payload) {
				return fmt.Errorf("record %d has other bytes", position)
			}
		default:
			return fmt.Errorf("record %d has type %d", position, r.Type)
		}
	}
	if len(archive) > 0 || len(names) > 0 {
		return fmt.Errorf("%d bytes and %d names are left", len(archive), len(names))
	}
	return nil
}

func main() {
	switch os.Args[1] {
	case "list":
		output := json.NewEncoder(os.Stdout)
		for _, path := range os.Args[2:] {
			if err := output.Encode(list(path)); err != nil {
				panic(err)
			}
		}
	case "split":
		if err := split(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}
