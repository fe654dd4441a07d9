package main

import (
	"bytes"
	"crypto/sha256"
	"encoding"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"math/rand"
	"os"
	"time"
)

const idLength, digestLength = 32, 64

// A push is a webhook as GitHub signs it, each with an id of its own near the end of the body, so that only the end has to be
// hashed for each: the load must not be what is measured.
type push struct {
	Path   string `json:"path"`
	Secret string `json:"secret"` // what signs; a wrong one, where refusing is to be measured
	Body   string `json:"body"`   // holds "%s" once, where the id of the delivery stands
	Status int    `json:"status"` // what has to answer
	Has    string `json:"has"`    // what the answer's body has to hold

	request       []byte
	idAt, markAt  int // the id in the head, and in the body, from where on it is hashed
	signatureAt   int
	inner, outer  []byte // SHA-256 states: after the key and the body's unchanging part, and after the key
	begun         uint64
	number        uint64
	hashed, after hash.Hash
}

func pushOf(at int) *push {
	data, err := os.ReadFile(os.Args[at])
	must(err)
	p := &push{begun: uint64(time.Now().UnixNano()), hashed: sha256.New(), after: sha256.New()}
	must(json.Unmarshal(data, p))
	before, tail, found := bytes.Cut([]byte(p.Body), []byte("%s"))
	if !found {
		fail("the body has no place for an id")
	}
	room := bytes.Repeat([]byte("0"), idLength)
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: GitHub-Hookshot/benchmark\r\nAccept: */*\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\nX-GitHub-Event: push\r\nX-GitHub-Hook-ID: 292430182\r\n"+
		"X-GitHub-Hook-Installation-Target-ID: 79929171\r\nX-GitHub-Hook-Installation-Target-Type: repository\r\n"+
		"X-GitHub-Delivery: ", p.Path, len(before)+idLength+len(tail))
	signature := "\r\nX-Hub-Signature-256: sha256="
	p.idAt, p.signatureAt = len(head), len(head)+idLength+len(signature)
	p.request = slice(head, string(room), signature, string(bytes.Repeat([]byte("0"), digestLength)), "\r\n\r\n")
	p.markAt = len(p.request) + len(before)
	p.request = append(p.request, slice(string(before), string(room), string(tail))...)
	p.inner, p.outer = state(p.Secret, 0x36, before), state(p.Secret, 0x5c, nil)
	return p
}

func slice(parts ...string) []byte {
	var made []byte
	for _, part := range parts {
		made = append(made, part...)
	}
	return made
}

// state is that of SHA-256 after HMAC's key and some data (RFC 2104).
func state(secret string, pad byte, data []byte) []byte {
	if len(secret) > sha256.BlockSize {
		fail("the secret is longer than a block")
	}
	block := bytes.Repeat([]byte{pad}, sha256.BlockSize)
	for index := range len(secret) {
		block[index] ^= secret[index]
	}
	h := sha256.New()
	h.Write(block)
	h.Write(data)
	made, err := h.(encoding.BinaryMarshaler).MarshalBinary()
	must(err)
	return made
}

func (p *push) next(*rand.Rand) []byte {
	p.number++
	id := fmt.Sprintf("%016x%016x", p.begun, p.number)
	copy(p.request[p.idAt:], id)
	copy(p.request[p.markAt:], id)
	must(p.hashed.(encoding.BinaryUnmarshaler).UnmarshalBinary(p.inner))
	p.hashed.Write(p.request[p.markAt:])
	must(p.after.(encoding.BinaryUnmarshaler).UnmarshalBinary(p.outer))
	var digest [sha256.Size]byte
	p.after.Write(p.hashed.Sum(digest[:0]))
	hex.Encode(p.request[p.signatureAt:], p.after.Sum(digest[:0]))
	return p.request
}

func (p *push) right(status int, body []byte) bool {
	return status == p.Status && bytes.Contains(body, []byte(p.Has))
}
