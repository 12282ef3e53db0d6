package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

type options struct {
	target      string
	model       string
	maxTokens   uint32
	temperature float64
	timeout     time.Duration
	question    string
	credential  string
	transport   credentials.TransportCredentials
}

// parse reads flags and the environment, whose names are those of the command `llmos`. The credential comes
// from the environment or a file only: the arguments of a process can be read by everyone on the machine.
func parse(arguments []string) (*options, error) {
	flags := flag.NewFlagSet("llmos-stream", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "Usage: llmos-stream [flags] QUESTION")
		flags.PrintDefaults()
	}
	target := flags.String("target", either("LLMOS_TARGET", "127.0.0.1:50050"), "host:port of the gateway (LLMOS_TARGET)")
	model := flags.String("model", os.Getenv("LLMOS_MODEL"), "the model (LLMOS_MODEL; otherwise the first that is ready)")
	maxTokens := flags.Uint("max-tokens", 128, "tokens of the answer at most")
	temperature := flags.Float64("temperature", -1, "0 always takes the most probable token (default: the model's)")
	timeout := flags.Duration("timeout", 5*time.Minute, "how long the answer may take")
	keyFile := flags.String("api-key-file", os.Getenv("LLMOS_API_KEY_FILE"), "a file with an API key (LLMOS_API_KEY_FILE, or LLMOS_API_KEY itself)")
	ca := flags.String("ca", os.Getenv("LLMOS_TLS_CA_FILE"), "PEM file of whom to trust (LLMOS_TLS_CA_FILE)")
	cert := flags.String("cert", os.Getenv("LLMOS_TLS_CERT_FILE"), "PEM file of this client's certificate (LLMOS_TLS_CERT_FILE)")
	key := flags.String("key", os.Getenv("LLMOS_TLS_KEY_FILE"), "PEM file of that certificate's key (LLMOS_TLS_KEY_FILE)")
	if err := flags.Parse(arguments); err != nil {
		return nil, err
	}
	if flags.NArg() != 1 {
		return nil, errors.New("give one question, in quotes; -h lists the flags")
	}
	o := &options{
		target: *target, model: *model, maxTokens: uint32(*maxTokens), temperature: *temperature,
		timeout: *timeout, question: flags.Arg(0),
	}
	var err error
	if o.transport, err = transport(*ca, *cert, *key); err != nil {
		return nil, err
	}
	if o.credential, err = credential(*keyFile); err != nil {
		return nil, err
	}
	if o.credential != "" && o.transport.Info().SecurityProtocol == "insecure" && !isLoopback(o.target) {
		return nil, fmt.Errorf("the credential would go to %s unencrypted: configure TLS", o.target)
	}
	return o, nil
}

func either(variable, otherwise string) string {
	if value := os.Getenv(variable); value != "" {
		return value
	}
	return otherwise
}

func credential(file string) (string, error) {
	if key := os.Getenv("LLMOS_API_KEY"); key != "" {
		return strings.TrimSpace(key), nil
	}
	if file == "" {
		return "", nil
	}
	content, err := os.ReadFile(file)
	return strings.TrimSpace(string(content)), err
}

func transport(ca, cert, key string) (credentials.TransportCredentials, error) {
	if ca == "" && cert == "" && key == "" {
		return insecure.NewCredentials(), nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", ca)
		}
	}
	if cert != "" || key != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(config), nil
}

func isLoopback(target string) bool {
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		return false
	}
	address := net.ParseIP(host)
	return host == "localhost" || (address != nil && address.IsLoopback())
}
