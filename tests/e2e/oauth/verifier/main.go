// A verifier of access tokens that knows nothing of llmos but the URL of its keys, its issuer and the
// audience: RFC 9068, section 4, by a JOSE library. Reads JSON strings, a token each, one a line; prints
// `accepted SUBJECT` or `refused WHY` for each.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/lestrrat-go/jwx/v3/jwa"
	"github.com/lestrrat-go/jwx/v3/jwk"
	"github.com/lestrrat-go/jwx/v3/jws"
	"github.com/lestrrat-go/jwx/v3/jwt"
)

const maxTokenBytes = 8 * 1024

func verify(text string, keys jwk.Set, issuer, audience string) (string, error) {
	if len(text) > maxTokenBytes {
		return "", errors.New("too long")
	}
	message, err := jws.ParseString(text)
	if err != nil {
		return "", err
	}
	if len(message.Signatures()) != 1 {
		return "", errors.New("not one signature")
	}
	headers := message.Signatures()[0].ProtectedHeaders()
	for _, name := range headers.Keys() {
		if name != "alg" && name != "typ" && name != "kid" {
			return "", errors.New("header " + name)
		}
	}
	// RFC 8725, section 3.1: one algorithm, chosen here and not by the token.
	if algorithm, ok := headers.Algorithm(); !ok || algorithm != jwa.EdDSAEd25519() {
		return "", errors.New("algorithm")
	}
	typ, _ := headers.Type()
	if typ = strings.ToLower(typ); typ != "at+jwt" && typ != "application/at+jwt" {
		return "", errors.New("type")
	}
	token, err := jwt.ParseString(text,
		jwt.WithKeySet(keys, jws.WithRequireKid(true)),
		jwt.WithValidate(true),
		jwt.WithIssuer(issuer),
		jwt.WithAudience(audience),
		jwt.WithRequiredClaim("exp"),
		jwt.WithRequiredClaim("iat"),
		jwt.WithRequiredClaim("sub"),
		jwt.WithRequiredClaim("jti"),
		jwt.WithRequiredClaim("client_id"))
	if err != nil {
		return "", err
	}
	subject, _ := token.Subject()
	return subject, nil
}

func main() {
	url, issuer, audience := os.Args[1], os.Args[2], os.Args[3]
	keys, err := jwk.Fetch(context.Background(), url)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	lines := bufio.NewReader(os.Stdin)
	for {
		line, err := lines.ReadString('\n')
		if line == "" && err != nil {
			return
		}
		var text string
		if err := json.Unmarshal([]byte(line), &text); err != nil {
			fmt.Println("refused not a JSON string")
			continue
		}
		subject, err := verify(text, keys, issuer, audience)
		if err != nil {
			fmt.Println("refused", strings.ReplaceAll(err.Error(), "\n", " "))
			continue
		}
		fmt.Println("accepted", subject)
	}
}
